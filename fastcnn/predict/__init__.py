"""The command ``fastcnn predict``: which images, which network, and the table of classes."""
