"""Runs the tritonserver of the wheel nvidia-pytriton on a repository until it is stopped.

usage: server.py REPOSITORY WHEEL_FOLDER PACKAGES [--onnxruntime FOLDER] [--threads N] [--port N]

WHEEL_FOLDER is the unzipped wheel nvidia-pytriton==0.7.0, PACKAGES a folder with numpy below 2 and onnxruntime for
Python 3.11 (pip install --target PACKAGES numpy==1.26.4 onnxruntime==1.30.0). Debian's libpython3.11 must be installed.
The wheel has no ONNX Runtime back end: --onnxruntime names the folder of Triton's own, which onnxruntime_backend beside
this file builds; without it model.py beside this file takes its place. --threads limits the threads of Triton's own.
HTTP is on port N, gRPC on N + 1, metrics on N + 2; all on this machine alone.
"""
import argparse
import os
import shutil
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("repository", type=Path)
parser.add_argument("wheel", type=Path)
parser.add_argument("packages", type=Path)
parser.add_argument("--onnxruntime", type=Path, metavar="FOLDER")
parser.add_argument("--threads", type=int, default=0, metavar="N")
parser.add_argument("--port", type=int, default=18000)
args = parser.parse_args()

root = args.wheel.resolve() / "pytriton/tritonserver"
python, graphs = root / "backends/python", root / "backends/onnxruntime"
stub = python / "triton_python_backend_stub"
shutil.copy(root / "python_backend_stubs/3.11/triton_python_backend_stub", stub)
for program in (stub, root / "bin/tritonserver"):
    program.chmod(0o755)
shutil.rmtree(graphs, ignore_errors=True)
if args.onnxruntime:
    shutil.copytree(args.onnxruntime, graphs)
else:
    graphs.mkdir()
    shutil.copy(Path(__file__).parent / "model.py", graphs)
# The stub reads no PYTHONPATH, but it searches its own folder.
for package in args.packages.resolve().iterdir():
    link = python / package.name
    if not link.exists():
        link.symlink_to(package)
environment = os.environ | {"LD_LIBRARY_PATH": str(args.wheel.resolve() / "nvidia_pytriton.libs")}
flags = {
    "model-repository": args.repository.resolve(),
    "backend-directory": root / "backends",
    "exit-on-error": "true",
    "http-address": "127.0.0.1",
    "grpc-address": "127.0.0.1",
    "metrics-address": "127.0.0.1",
    "http-port": args.port,
    "grpc-port": args.port + 1,
    "metrics-port": args.port + 2,
}
arguments = [f"--{name}={value}" for name, value in flags.items()]
if args.threads:
    settings = ("enable-global-threadpool=1", f"intra_op_thread_count={args.threads}", "inter_op_thread_count=1")
    arguments += [f"--backend-config=onnxruntime,{setting}" for setting in settings]
os.execvpe(root / "bin/tritonserver", ["tritonserver", *arguments], environment)
