"""The fleet: expert actors that fill the trajectory store, and the broker that commands them."""
