"""What a registered PD test would launch, asked of one release of SGLang without starting anything."""
