"""Pictures: WebDataset shards, folders, data sets of torchvision, and the views of them."""
