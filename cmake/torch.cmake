# The torch that Python sees, linked directly: find_package(Torch) insists on a complete CUDA toolkit even for a CPU build.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
          "import torch, os; from torch.utils import cpp_extension as e; r = os.path.dirname(torch.__file__); \
print(torch.__version__, torch.version.cuda or '', int(torch.compiled_with_cxx11_abi()), os.path.join(r, 'lib'), ';'.join(e.include_paths()), sep='|')"
  OUTPUT_VARIABLE MLPKIT_TORCH_FACTS
  ERROR_VARIABLE MLPKIT_TORCH_ERROR
  OUTPUT_STRIP_TRAILING_WHITESPACE
  RESULT_VARIABLE MLPKIT_TORCH_MISSING)
if(MLPKIT_TORCH_MISSING)
  message(FATAL_ERROR "mlpkit is built against the torch of your environment, and ${Python_EXECUTABLE} cannot import torch: install torch>=2.11 "
                      "there first, then run: pip install --no-build-isolation .")
endif()
string(REGEX MATCH "^([^|]*)\\|([^|]*)\\|([^|]*)\\|([^|]*)\\|(.*)$" MLPKIT_MATCH "${MLPKIT_TORCH_FACTS}")
set(MLPKIT_TORCH_VERSION "${CMAKE_MATCH_1}")
set(MLPKIT_TORCH_CUDA "${CMAKE_MATCH_2}")
set(MLPKIT_TORCH_ABI "${CMAKE_MATCH_3}")
set(MLPKIT_TORCH_LIB "${CMAKE_MATCH_4}")
set(MLPKIT_TORCH_INCLUDE ${CMAKE_MATCH_5})
if(MLPKIT_TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "mlpkit needs torch>=2.11; ${Python_EXECUTABLE} has torch ${MLPKIT_TORCH_VERSION}: pip install -U torch")
endif()
message(STATUS "mlpkit: torch ${MLPKIT_TORCH_VERSION} (CUDA: ${MLPKIT_TORCH_CUDA}) in ${MLPKIT_TORCH_LIB}")

# torch's inline structures have other members without NDEBUG, so every build type defines it.
add_compile_definitions(NDEBUG _GLIBCXX_USE_CXX11_ABI=${MLPKIT_TORCH_ABI})

find_package(OpenMP COMPONENTS CXX) # at::parallel_for is an inline template that needs it

function(mlpkit_link_torch target)
  target_include_directories(${target} SYSTEM PRIVATE ${MLPKIT_TORCH_INCLUDE})
  set(libraries torch torch_cpu torch_python c10)
  if(MLPKIT_WITH_CUDA)
    list(APPEND libraries torch_cuda c10_cuda)
  endif()
  foreach(library IN LISTS libraries)
    find_library(MLPKIT_LIB_${library} ${library} PATHS "${MLPKIT_TORCH_LIB}" NO_DEFAULT_PATH REQUIRED)
    target_link_libraries(${target} PRIVATE "${MLPKIT_LIB_${library}}")
  endforeach()
  if(OpenMP_CXX_FOUND)
    target_link_libraries(${target} PRIVATE OpenMP::OpenMP_CXX)
  endif()
  if(NOT APPLE)
    target_link_options(${target} PRIVATE -Wl,--no-as-needed) # weak BLAS symbols keep libtorch_cpu needed
  endif()
endfunction()
