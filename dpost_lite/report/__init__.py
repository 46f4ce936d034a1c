"""What a run looks like to its user: events and files in, text out. Knows neither weights nor recipes."""
