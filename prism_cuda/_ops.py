from prism_cuda.ops import LIBRARY as LIBRARY
from prism_cuda.ops import call as call
from prism_cuda.ops import is_loaded as is_loaded
from prism_cuda.ops import load as load
