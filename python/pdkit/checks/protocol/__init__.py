"""What clients of prefill and decode meet, through SGLang's mini load balancer and its router; one topic a file."""
