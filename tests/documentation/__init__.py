"""What the test of the documentation is made of: the pages, the user that runs their blocks, the messages of the code."""
