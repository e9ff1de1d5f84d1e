"""What reads bytes. ``reference`` is the definition, everything else is tested against it."""
