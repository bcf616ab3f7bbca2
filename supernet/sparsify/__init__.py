"""From a trained model to one whose slices are sparse: neuron orders, routers, and what each choice costs."""
