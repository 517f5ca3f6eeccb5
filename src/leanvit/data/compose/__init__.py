"""Practice pictures with exact annotations: cut-outs placed on parts of photographs."""
