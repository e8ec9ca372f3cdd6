# Choose the default of CMAKE_CUDA_ARCHITECTURES.
#
# If nvidia-smi sees GPUs, the default is machine code for exactly these, or, for a GPU that is newer than this nvcc, PTX
# of the newest architecture before it, which the driver compiles when the module is first used.
#
# Else the machine that compiles is not the one that computes, and the default is a short list that serves every GPU that
# the kernels support: PTX of the oldest architecture for the old ones, machine code of 8.0, which 8.6 and 8.9 run too,
# and machine code and PTX of 9.0, from which the driver compiles for all later ones. Machine code for every major
# architecture would take more than twice as long to compile; the wheels have it.

# Set `out` to the default for a compiler that supports the architectures `supported` (a list such as 75;80;90).
function(antdiff_default_architectures out supported)
  set(_usable "")
  foreach(_arch IN LISTS supported) # the kernels take tables as __grid_constant__ parameters, which need 7.0
    if(_arch GREATER_EQUAL 70)
      list(APPEND _usable ${_arch})
    endif()
  endforeach()
  list(SORT _usable COMPARE NATURAL)

  set(_present "")
  find_program(ANTDIFF_NVIDIA_SMI nvidia-smi NO_CACHE)
  if(ANTDIFF_NVIDIA_SMI)
    execute_process(COMMAND "${ANTDIFF_NVIDIA_SMI}" --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE _listed RESULT_VARIABLE _failed ERROR_QUIET)
    if(NOT _failed)
      string(REGEX MATCHALL "[0-9]+\\.[0-9]+" _present "${_listed}")
    endif()
  endif()
  set(_chosen "")
  foreach(_capability IN LISTS _present)
    string(REPLACE "." "" _arch ${_capability})
    if(_arch IN_LIST _usable)
      list(APPEND _chosen ${_arch}-real)
    else()
      set(_below "")
      foreach(_candidate IN LISTS _usable)
        if(_candidate LESS _arch)
          set(_below ${_candidate})
        endif()
      endforeach()
      if(_below)
        list(APPEND _chosen ${_below}-virtual)
      else()
        message(STATUS "antdiff: a GPU of compute capability ${_capability} is older than the CUDA kernels support")
      endif()
    endif()
  endforeach()
  list(REMOVE_DUPLICATES _chosen)
  if(NOT _chosen)
    list(GET _usable 0 _oldest)
    set(_chosen ${_oldest}-virtual 80-real 90)
  endif()
  set(${out} ${_chosen} PARENT_SCOPE)
endfunction()
