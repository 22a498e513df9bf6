"""What an attacker really learns from a finished run: gradient inversion, membership inference, canaries."""
