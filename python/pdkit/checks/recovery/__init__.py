"""What a deployment does when a part of it is killed, freezes, or gets words that it did not expect."""
