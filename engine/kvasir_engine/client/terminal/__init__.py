"""`kvasir chat` and `kvasir complete`: an endpoint in the terminal."""
