"""Words for facts: how an interval was made, what a gate or a warning found. Nothing reads them back."""
