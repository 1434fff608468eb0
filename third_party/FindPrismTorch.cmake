# Defines prism_cuda::torch: headers and libraries of the torch that $PRISM_TORCH_DIR names, or that
# Python3_EXECUTABLE imports. By path: find_package(Torch) would ask for a CUDA toolkit like torch's.
if(NOT PRISM_TORCH_DIR)
  find_package(Python3 QUIET COMPONENTS Interpreter)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -c "print(__import__('torch').__path__[0])"
    OUTPUT_VARIABLE PRISM_TORCH_DIR
    ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  PrismTorch
  REQUIRED_VARS PRISM_TORCH_DIR
  REASON_FAILURE_MESSAGE
    "no torch was found: set Python3_EXECUTABLE to a Python that has it, or PRISM_TORCH_DIR to libtorch")
if(PrismTorch_FOUND AND NOT TARGET prism_cuda::torch)
  add_library(prism_cuda::torch INTERFACE IMPORTED)
  target_include_directories(
    prism_cuda::torch SYSTEM INTERFACE ${PRISM_TORCH_DIR}/include
                                       ${PRISM_TORCH_DIR}/include/torch/csrc/api/include)
  target_link_options(prism_cuda::torch INTERFACE -Wl,--no-as-needed)
  foreach(name torch torch_cpu c10 torch_cuda c10_cuda)
    if(EXISTS ${PRISM_TORCH_DIR}/lib/lib${name}.so)
      target_link_libraries(prism_cuda::torch INTERFACE ${PRISM_TORCH_DIR}/lib/lib${name}.so)
    endif()
  endforeach()
endif()
