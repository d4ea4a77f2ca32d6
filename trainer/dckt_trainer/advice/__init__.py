"""Which method to use: candidates, trained within a budget, judged on validation, and told of in words."""
