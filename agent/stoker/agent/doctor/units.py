"""The names of the units of systemd that GPUs and the agent need."""

PERSISTENCED = "nvidia-persistenced.service"
FABRIC_MANAGER = "nvidia-fabricmanager.service"
AGENT = "stoker-agent.service"
HELPER = "stoker-agent-helper.service"
UNITS = (PERSISTENCED, FABRIC_MANAGER, AGENT, HELPER)
