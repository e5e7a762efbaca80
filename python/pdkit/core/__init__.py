"""What every other part of pdkit stands on; it knows no server."""
