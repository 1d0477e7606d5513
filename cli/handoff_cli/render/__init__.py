"""Messages of the API as text. Pure: a message and the time in, something to print out."""
