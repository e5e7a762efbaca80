"""What is launched, watched and stopped."""
