from twin_nets import *  # noqa: F403
