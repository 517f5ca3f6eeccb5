"""The page that runs a bundle in the browser: a static folder with onnxruntime-web. No torch."""
