"""How a low-bit model is made: recipes, data, metrics, distillation. Imports only public names of `modeling_qbert`."""
