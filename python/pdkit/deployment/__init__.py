"""What is launched, watched and stopped: the servers of a prefill/decode deployment."""
