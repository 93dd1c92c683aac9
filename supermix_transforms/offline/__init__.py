"""The mixed set D' written once, as recipes or mixed shards, and read often."""
