"""Development tools of this repository. Nothing in the product imports them."""
