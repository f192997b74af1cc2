"""What fits, and (to come) what is fastest. No torch."""
