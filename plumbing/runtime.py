"""What a script needs of the machine: its device, the other ranks, signals, precision, errors in one line."""

import atexit
import contextlib
import functools
import importlib.util
import inspect
import json
import multiprocessing
import os
import re
import signal
import sys
import uuid
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

LAYER = r"\b(layers|sit\.blocks)\.\d+"  # a Transformer layer's name, of ours or of SiT's
launched = {"job": "", "status": None}  # the ranks' job; this process's exit status, once it is known
CAN_FORK = "fork" in multiprocessing.get_all_start_methods()  # Windows cannot
# Signals that ask a run to end. SLURM can send SIGUSR1 some time before a job's end; Windows does not have it.
ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


@contextlib.contextmanager
def one_line_errors():
    """A context in which the errors of wrong settings (ValueError, OSError) become one line and exit status 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        launched["status"] = 1
        raise SystemExit(str(error)) from error


@functools.cache
def note(text):
    """Print a line about what is no error but may surprise the user, once in a program, on the first rank alone."""
    if rank_and_world()[0] == 0:
        print(f"note: {text}", file=sys.stderr)


def claim(path, settings, message):
    """Make a folder for work that can be continued, and record the work's settings in the file `path` in it.

    Raises ValueError(message) if the file records other settings; also ValueError if it is damaged and the folder holds
    other files, whose settings nobody can tell.
    """
    part = path.with_name(path.name + ".part")
    try:
        theirs = json.loads(path.read_text("utf-8")) if path.exists() else settings
    except ValueError as error:
        if set(os.listdir(path.parent)) - {path.name, part.name}:
            raise ValueError(f"{path} is damaged ({error}): remove it if all beside it was made with the settings of "
                             "now, or choose another folder") from error
        theirs = settings
    if theirs != settings:
        raise ValueError(message)
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(settings) + "\n", "utf-8")
    os.replace(part, path)


class Interrupt:
    """A context in which Ctrl-C, SIGTERM and SIGUSR1 ask for an end after the current iteration; a Ctrl-C after any of
    them ends the program at once."""

    asked = False
    by_keyboard = False

    def __enter__(self):
        self.before = {number: signal.signal(number, self.ask) for number in ENDING}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, frame):
        self.asked = True
        self.by_keyboard = number == signal.SIGINT
        signal.signal(signal.SIGINT, signal.default_int_handler)


def find_device(name=""):
    """The device called `name`, or the best there is: cuda, else mps, else cpu. Raises ValueError if it is absent."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name or best)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown: choose cuda, mps or cpu") from error
    try:
        torch.empty(1, device=device).item()  # fails on "meta", a device without values
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"device {name!r} is not available here: leave it out for {best!r}") from error
    return device


def start_ranks(device_name="", patience=timedelta(minutes=10)):
    """Join the other processes under torchrun or srun, if there are any; return device, rank, world size.

    patience: how long a rank waits for a silent one before it ends with an error. Raises ValueError where the
    environment does not say which process this is, or the processes cannot meet.
    """
    device = find_device(device_name)
    if not (found := ranks_of_environment()):
        return device, 0, 1
    rank, world, local_rank = found
    if device.type == "cuda":
        device = torch.device("cuda", own_gpu(local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    try:
        store, rank, world = next(dist.rendezvous("env://", rank, world))
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0]
        raise ValueError(f"the {world} processes cannot meet at {where} ({reason}): see that all are started and reach "
                         "it, or set another MASTER_PORT") from error
    launched["job"] = store.compare_set("job", "", uuid.uuid4().hex).decode()
    # torchrun keeps this store through its restarts: without a prefix of its own, a restarted rank may find the address
    # that a dead one left there, and wait for it. Several nodes need no prefix, and do not count restarts alike.
    prefix = f"start {restarts()}" if os.environ.get("LOCAL_WORLD_SIZE") == str(world) else "start"
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.PrefixStore(prefix, store),
                            rank=rank, world_size=world, timeout=patience)
    atexit.register(end_at_once)
    return device, rank, world


def ranks_of_environment():
    """Rank, world size, and rank on this node (None if no variable says it); None in place of all for a single process.

    They are read from the variables that torchrun sets, or those of a task of `srun`. In a task of srun, MASTER_ADDR
    and MASTER_PORT are set if they are missing. Raises ValueError for missing or wrong variables.
    """
    variables = os.environ
    # a batch script has SLURM_PROCID and SLURM_NTASKS too, but is no task: only srun says how many the step has
    tasks = variables.get("SLURM_STEP_NUM_TASKS") or "MASTER_ADDR" in variables and variables.get("SLURM_NTASKS")
    of_srun = {"RANK": variables.get("SLURM_PROCID"), "WORLD_SIZE": tasks, "LOCAL_RANK": variables.get("SLURM_LOCALID")}
    if "RANK" not in variables and (not all(of_srun.values()) or tasks == "1"):
        return None
    if tasks:
        meet_in_slurm()
    found = {name: variables.get(name) or of_srun[name] for name in of_srun}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        value = found.get(name) or variables.get(name)
        if value is None and name == "LOCAL_RANK":  # which only GPUs need
            continue
        if value is None or name != "MASTER_ADDR" and not value.isdecimal():
            raise ValueError(f"{name} is {value!r}, though this is one of several processes: start them with torchrun "
                             "or srun, which say where each belongs, or one process without RANK")
    rank, world, local_rank = (value and int(value) for value in found.values())
    if rank >= world:
        raise ValueError(f"RANK is {rank}, but WORLD_SIZE {world}: ranks count from 0")
    return rank, world, local_rank


def meet_in_slurm():
    """Set MASTER_ADDR to the first node of a step of srun, and MASTER_PORT to a number that follows from the step."""
    variables = os.environ
    nodes = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST") or "localhost"
    first = re.sub(r"\[(\d+)[^\]]*\]", r"\1", nodes).split(",")[0]  # of gpu[003-006,9],cpu1: gpu003
    step = 101 * int(variables.get("SLURM_JOB_ID", 0)) + int(variables.get("SLURM_STEP_ID", 0))
    variables.setdefault("MASTER_ADDR", first)
    variables.setdefault("MASTER_PORT", str(10_000 + step % 20_000))


def own_gpu(local_rank, count):
    """The number of a process's GPU among the `count` that it sees. Raises ValueError where there is none for it."""
    if local_rank is None:
        raise ValueError("RANK is set, but LOCAL_RANK is not, which says whose GPU is whose: start with torchrun or "
                         "srun, or set LOCAL_RANK to the process's number on its node")
    if count == 1 and "SLURM_LOCALID" in os.environ:
        return 0  # srun --gpus-per-task=1 shows each task only its own GPU
    if local_rank >= count:
        started = os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)
        raise ValueError(f"there are {count} GPUs here for {started} processes: lower --nproc_per_node")
    return local_rank


def in_bfloat16(config, device):
    """Whether networks and Muon compute in bfloat16: as the config says, or if it says None, on CUDA only.

    A CPU with instructions for bfloat16 is twice as fast in it; one without them is several times slower.
    """
    return device.type == "cuda" if config["bfloat16"] is None else config["bfloat16"]


def autocast(config, device):
    """A context in which the networks compute in bfloat16, if in_bfloat16() says so."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=in_bfloat16(config, device))


@contextlib.contextmanager
def coarse_products(device):
    """A context in which float32 matrix products on CUDA may keep ten bits of each number (TF32) and are much faster.

    This is exact enough for training in bfloat16 and for samples, but not for a reported likelihood or an inverse.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def training_products(config, device):
    """The context for an update's float32 products: TF32 if the network is in bfloat16, else all digits.

    The numbers of a network in bfloat16 have seven bits, so ten are enough for its head and the likelihood.
    """
    return coarse_products(device) if in_bfloat16(config, device) else exact_products(device)


@contextlib.contextmanager
def exact_products(device):
    """A context in which networks compute in float32 with all digits, even inside of autocast or coarse_products: for
    every likelihood that is reported."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False  # of convolutions, for which torch allows TF32 by default
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def can_compile():
    """Whether torch.compile works for CUDA: it needs Triton, which torch for Windows does not install."""
    return importlib.util.find_spec("triton") is not None


def check_compile(config):
    """Raise ValueError for an unknown value of the setting `compile`."""
    if config["compile"] not in (None, True, False, "layers"):
        raise ValueError(f"compile is {config['compile']!r}: choose True, False or 'layers'")


def for_training(model, config, device):
    """The model, or a method of one, as training calls it: compiled if the settings say so, a model wrapped for ranks.

    With compile "layers", each of the Transformer's layers is compiled instead of the whole; they share one graph.
    """
    compiled = config["compile"]
    if compiled is None:
        compiled = device.type == "cuda" and can_compile()
    warnings.filterwarnings("ignore", "TensorFloat32")  # it is off on purpose: a run in float32 wants all digits
    network = model
    if compiled == "layers":
        compile_layers(getattr(model, "__self__", model))
    elif compiled:
        network = torch.compile(model)
    if dist.is_initialized() and isinstance(model, torch.nn.Module):
        # Views of the buckets save a second copy of the gradients. Buffers need no synchronisation, as training changes
        # none; torch 2.13 gave that option another name.
        known = inspect.signature(DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        network = DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None,
                                          gradient_as_bucket_view=True, **{sync: False})
    return network


def compile_layers(model):
    """Compile each of a model's Transformer layers in place; code and shapes are the same, so one graph serves."""
    for name, module in model.named_modules():
        if re.fullmatch(f".*{LAYER}", name):
            module.compile()


@contextlib.contextmanager
def uncompiled():
    """A context in which compiled networks run uncompiled: for validation's sizes they would be compiled once more."""
    compiled = "torch._dynamo" in sys.modules  # else nothing is, and importing it would take two seconds
    with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
        yield


def alike(*networks):
    """Copy the networks' weights from the first rank to all others, in place."""
    if dist.is_initialized():
        for network in networks:
            for tensor in network.state_dict().values():
                dist.broadcast(tensor, 0)


def gradients_meet(network, last):
    """A context in which a backward pass sums gradients over the ranks only if `last`, the last pass of an update."""
    return contextlib.nullcontext() if last or not dist.is_initialized() else network.no_sync()


def accumulate(losses_of, network, batches, config, device, *tensors):
    """Compute a batch's gradients, in as many passes as memory needs, and return its losses for the log.

    losses_of(*tensors of a pass) -> {name: scalar}; "minimised" is differentiated if there is one, else "loss". All but
    "minimised" are returned, without gradients: the mean over the passes, divided by the number of ranks. The last pass
    sums gradients over the ranks. network: what for_training returned.
    """
    totals = {}
    world = rank_and_world()[1]
    for number, of_a_pass in enumerate(batches.chunks(*tensors), 1):
        with gradients_meet(network, number == batches.passes), training_products(config, device):
            with autocast(config, device):
                losses = losses_of(*of_a_pass)
            minimised = losses.pop("minimised", losses["loss"])
            (minimised / batches.passes).backward()
        for name, value in losses.items():
            totals[name] = totals.get(name, 0.0) + value.detach() / (batches.passes * world)
    return totals


def all_sum(tensor):
    """Sum a tensor over all ranks, in place; return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_sums(values, device):
    """The sums over all ranks of {name: number or scalar tensor on the device}, as {name: float}, by one reduction.

    An update waits for the device here, and otherwise only with whole trajectories of several T.
    """
    tensors = {name: value for name, value in values.items() if torch.is_tensor(value)}
    numbers = {name: value for name, value in values.items() if name not in tensors}
    on_device = torch.tensor([*numbers.values()], dtype=torch.float32).to(device, non_blocking=True)
    stacked = torch.cat([torch.stack([*tensors.values()]).float(), on_device])
    return dict(zip([*tensors, *numbers], all_sum(stacked).tolist()))


def meet_ranks():
    """Wait for the other ranks, so that none leaves while another still communicates."""
    if dist.is_initialized():
        dist.barrier()


def leave_ranks(status=0):
    """Leave the group of ranks, after meet_ranks, as a program's last call. status: the exit status of end_at_once."""
    if dist.is_initialized():
        if dist.get_backend() == "nccl":
            dist.destroy_process_group()
        launched["status"] = status


def end_at_once():
    """End a rank without Python's own shutdown, as its last exit handler, unless an exception has been printed.

    One of gloo's threads may still wait for Python's lock, to free a tensor. Freeing the process group waits for that
    thread: for ever, if the one who frees it holds the lock. And if Python ends first, the thread aborts the process.
    """
    if launched["status"] is not None and not hasattr(sys, "last_value"):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(launched["status"])


def rank_and_world():
    """This process's rank and the number of ranks; 0 and 1 for a process alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gathered(value):
    """The values that all ranks have given, a list in the order of ranks. Every rank has to call this."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first_rank(function, *arguments):
    """Call a function on the first rank alone; return its result on all ranks.

    A ValueError or OSError of the function is raised on all ranks.
    """
    result, error = None, None
    if rank_and_world()[0] == 0:
        try:
            result = function(*arguments)
        except (ValueError, OSError) as raised:
            error = raised
    result, error = gathered((result, error))[0]
    if error:
        raise error
    return result


def restarts():
    """How often torchrun has started this process anew, as it does with --max-restarts when one dies."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def job():
    """A name that tells this torchrun job from others, the same on all ranks and through restarts; "" without one."""
    return launched["job"]
