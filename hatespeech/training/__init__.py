"""From rows to a run's folder. Imports the ground floor alone; needs the train extra."""
