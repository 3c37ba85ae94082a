"""Notebooks, data sets and models on Kaggle, through its command line."""
