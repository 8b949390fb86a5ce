"""python -m hatespeech.bulk"""

from hatespeech.bulk.job import main

if __name__ == "__main__":
    main()
