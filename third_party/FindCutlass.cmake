# Defines the header-only target cutlass::cutlass from what find_cutlass.py finds.
execute_process(
  COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/find_cutlass.py
  OUTPUT_VARIABLE Cutlass_INCLUDE_DIR
  ERROR_VARIABLE Cutlass_error
  RESULT_VARIABLE Cutlass_status
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT Cutlass_status EQUAL 0)
  message(FATAL_ERROR "${Cutlass_error}")
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(Cutlass REQUIRED_VARS Cutlass_INCLUDE_DIR)
if(NOT TARGET cutlass::cutlass)
  add_library(cutlass::cutlass INTERFACE IMPORTED)
  target_include_directories(cutlass::cutlass SYSTEM INTERFACE ${Cutlass_INCLUDE_DIR})
endif()
