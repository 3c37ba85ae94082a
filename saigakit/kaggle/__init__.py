"""Drive the kaggle command line: notebooks, data sets and models."""
