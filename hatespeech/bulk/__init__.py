"""Many texts at once: scoring.py computes, job.py runs it over files on Ray Data. Imports the ground floor alone."""
