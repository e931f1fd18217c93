"""The page at `/`: static files, and the route that serves them."""
