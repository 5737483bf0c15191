"""Readers of data sets, one module for each form that a data set may have."""
