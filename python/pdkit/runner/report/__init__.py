"""What a run leaves behind, and how it is shown: report directory -> dataclasses -> terminal, JUnit, GitHub, HTML."""
