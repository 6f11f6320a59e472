"""What travels along an edge of the graph: the terms of a student's loss, one file a family."""

from distill_jax.methods.attention import AT, NST
from distill_jax.methods.base import Context, Hyper, Method, Shapes, Term, heard, taps, total
from distill_jax.methods.boundary import BSS
from distill_jax.methods.byot import BYOT
from distill_jax.methods.ca_mkd import CAMKD
from distill_jax.methods.connectors import AB, SRRL
from distill_jax.methods.consistency import CSKD, DDGSD
from distill_jax.methods.contrastive import CRD
from distill_jax.methods.correlation import CC
from distill_jax.methods.curriculum import CTKD
from distill_jax.methods.decoupled import DKD, NKD
from distill_jax.methods.dml import DML, KDCL
from distill_jax.methods.factors import FT
from distill_jax.methods.fitnet import FitNet
from distill_jax.methods.flow import FSP, KDSVD
from distill_jax.methods.frskd import FRSKD
from distill_jax.methods.kd import KD, CrossEntropy, LossOptions
from distill_jax.methods.logits import DIST, WTTM, MSELogits
from distill_jax.methods.norms import L2, N3
from distill_jax.methods.peers import ONE, OKDDip
from distill_jax.methods.progressive import PSKD
from distill_jax.methods.registry import (
    ELSEWHERE,
    METHODS,
    build,
    check_name,
    identity_of,
    is_registered,
    names,
    register_method,
)
from distill_jax.methods.relations import PKT, RKD, SP
from distill_jax.methods.review import ReviewKD
from distill_jax.methods.scaling import NormKD
from distill_jax.methods.semantic import SemCKD
from distill_jax.methods.several import AEKD, AVER, EBKD
from distill_jax.methods.smoothing import LabelSmoothing, TfKDReg, TfKDSelf
from distill_jax.methods.synergy import DCM, DKS
from distill_jax.methods.teskd import TESKD
from distill_jax.methods.variational import VID

__all__ = [
    "AB",
    "AEKD",
    "AT",
    "AVER",
    "BYOT",
    "BSS",
    "CAMKD",
    "CC",
    "CRD",
    "CSKD",
    "CTKD",
    "DCM",
    "DDGSD",
    "DIST",
    "DKD",
    "DKS",
    "DML",
    "EBKD",
    "ELSEWHERE",
    "FRSKD",
    "FSP",
    "FT",
    "KD",
    "KDCL",
    "KDSVD",
    "L2",
    "METHODS",
    "N3",
    "NKD",
    "NST",
    "ONE",
    "PKT",
    "PSKD",
    "RKD",
    "SP",
    "SRRL",
    "TESKD",
    "VID",
    "WTTM",
    "Context",
    "CrossEntropy",
    "FitNet",
    "Hyper",
    "LabelSmoothing",
    "LossOptions",
    "MSELogits",
    "Method",
    "NormKD",
    "OKDDip",
    "ReviewKD",
    "SemCKD",
    "Shapes",
    "Term",
    "TfKDReg",
    "TfKDSelf",
    "build",
    "check_name",
    "heard",
    "identity_of",
    "is_registered",
    "names",
    "register_method",
    "taps",
    "total",
]
