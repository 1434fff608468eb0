# find_package(prism_cuda): prism_cuda::prism_cuda has the typed calls and links the ops library,
# whose path is $<TARGET_FILE:prism_cuda::prism_ops> for programs that load it themselves.
list(APPEND CMAKE_MODULE_PATH ${CMAKE_CURRENT_LIST_DIR})
include(CMakeFindDependencyMacro)
find_dependency(PrismTorch MODULE)
include(${CMAKE_CURRENT_LIST_DIR}/prism_cudaTargets.cmake)
