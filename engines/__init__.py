"""package -> callable nets. The only folder that imports onnxruntime, tensorrt or cuda."""
