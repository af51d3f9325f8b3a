"""`python -m meshwright.train.cli VERB`: the command `meshwright` where it is not on the path."""

from .main import main

if __name__ == "__main__":
    main()
