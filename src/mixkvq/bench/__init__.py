"""What a cache costs in time and bytes."""

#: The name of an unquantized cache in results.
BF16 = "bf16"
