"""A table."""


def best(tables):
    return tables["runs"].nsmallest(1, "train_loss")
