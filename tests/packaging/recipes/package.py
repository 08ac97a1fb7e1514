class Vllm(PythonPackage):  # noqa: F821
    version("0.20.2")  # noqa: F821
    # patches go here
