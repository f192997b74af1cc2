"""The nouns: requests, layouts, plans, model shapes, the actions of the scheduler, errors. No torch."""
