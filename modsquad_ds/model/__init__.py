"""The network: token pack, routers, sparse layers, backbone, heads. Knows no DeepSpeed and no ranks."""
