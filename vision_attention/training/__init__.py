"""What the loop is made of; knows neither data sets nor models."""
