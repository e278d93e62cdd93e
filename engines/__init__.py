"""package -> callable nets. The only folder that imports onnxruntime, tensorrt or cuda.

What a user should know and no error says is told to `logging`, by loggers named after their modules below
`latentrt`: every folder imports this one, so here that name is kept from printing by itself.
"""

import logging

logging.getLogger("latentrt").addHandler(logging.NullHandler())
