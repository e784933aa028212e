"""The charts of a PerA run in the report."""

from pera_jax.objectives.watched import Panel

CURVES = (
    ("Loss terms", (
        Panel("Class term, nats", False, True,
              {"loss/class": "all", "loss/class_global": "global part", "loss/class_local": "local part"}),
        Panel("KoLeo term", False, True, {"loss/koleo": "koleo"}),
        Panel("Pixel term", True, True, {"loss/pixel": "pixel"}),
    )),
    ("Teacher", (
        Panel("Entropy of the teacher, nats", False, True,
              {"teacher/entropy": "of each view", "teacher/entropy_of_mean": "of their mean"}),
        Panel("KL of student from teacher, nats", False, True, {"kl": "kl"}),
        Panel("KL of their mean from uniform, nats", False, True, {"teacher/kl_to_uniform": "kl"}),
        Panel("Variance of directions (0: all equal)", False, True,
              {"teacher/feature_variance": "class tokens", "teacher/unit_variance": "head"}),
        Panel("Prototypes in use", True, True, {"teacher/prototypes_in_use": "prototypes"}),
        Panel("Norm of the center", False, True, {"teacher/center_norm": "center"}),
    )),
    ("Schedules", (
        Panel("Momentum of the teacher", False, False, {"hyper/momentum": "momentum"}),
        Panel("Temperatures", False, False,
              {"hyper/teacher_temperature": "teacher", "hyper/student_temperature": "student"}),
    )),
)  # fmt: skip
