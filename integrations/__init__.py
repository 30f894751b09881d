"""Plans inside the frameworks that train: one module a framework, which needs that framework.

moeplace.integrations.torchtitan    pip install 'moeplace[torchtitan]'
moeplace.integrations.megatron      pip install 'moeplace[megatron]'
moeplace.integrations.deepspeed     pip install 'moeplace[deepspeed]'
"""
