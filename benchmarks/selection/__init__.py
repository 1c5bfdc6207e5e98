"""When the selection of channels may stop, and where refining a reconstruction helps."""
